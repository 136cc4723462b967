"""The bytes of an image: structure of JPEG, PNG and WebP, full decoding, re-encoding, and whether it is accepted."""
