"""The images to pack: what SRC is, which images are in it, the class of each, and its bytes."""
