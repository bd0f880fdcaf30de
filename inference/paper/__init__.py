"""The paper's figures and numbers: computed, drawn, and written to files."""
