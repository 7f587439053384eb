"""Records and manifests, image decoding, parallel text, templates and the on-disk caches. Never a model."""
