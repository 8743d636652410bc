"""The frontier: the CFG gain that each method keeps at each number of denoiser passes."""
