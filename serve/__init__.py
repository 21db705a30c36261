"""The Ray Serve application. This release has none yet: SAEs are trained, measured and loaded in Python."""
