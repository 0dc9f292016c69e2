"""Programs that train, sample and evaluate the image models of the project."""
