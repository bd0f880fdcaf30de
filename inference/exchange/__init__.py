"""Published models in and out: runs of them, and folders that other libraries load."""
