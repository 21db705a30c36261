"""The Ray Serve application. This release of miDiscover has none yet: SAEs are trained, measured and loaded in Python."""
