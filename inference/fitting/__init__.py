"""MAP and variational guides: the SVI step, the loop around it, and draws from a guide."""
