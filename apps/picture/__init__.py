"""A bank as a picture: laid out as an icicle, drawn as HTML or PNG."""
