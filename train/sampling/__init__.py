"""Sets of images: what is drawn, with what, and their files."""
