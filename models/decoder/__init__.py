"""One decoder for the architectures that people publish, as pure functions of a parameter tree."""
