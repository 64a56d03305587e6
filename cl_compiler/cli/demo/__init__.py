"""`cl-compiler demo`: a contrastive training run on data that every installation has.

The pipeline, a file each: ``sources`` (which files may be read) → ``harvest`` (pairs of description
and code) → ``collection`` (kept beside the cache) → ``encoders`` (hashed features, two towers) →
``arms`` (the compiled and the dense loss under one budget) → ``same_batch`` (both beyond it) →
``training`` (both, interleaved) → ``comparison`` (what that shows, and what it does not) →
``figures`` and ``report``.  ``command``
ties them together; the modules that need PyTorch are imported there, when they are needed.
"""
