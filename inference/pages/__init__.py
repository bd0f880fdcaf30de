"""Pages that show a text and its margins in a browser, and what results show in a notebook."""
