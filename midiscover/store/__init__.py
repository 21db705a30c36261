"""Where artifacts live: storage (folder or bucket), layout (every path), blocks (activations), loader (the stream)."""
