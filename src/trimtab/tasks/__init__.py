"""Tasks: towers + adapter + objective; a batch in, named loss terms out. No input or output of their own."""
