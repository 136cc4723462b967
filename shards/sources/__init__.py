"""Where pictures come from: what SRC is, what is in it, which class each picture is of, its bytes."""
