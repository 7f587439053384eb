"""Frozen encoders behind one small interface; the only room that knows transformers and OpenCLIP."""
