"""What a fitted network does on a text: scores, noise, margins, generation."""
