"""What loads models and draws with them: settings in, progress and results out; nothing of a page or a command line."""
