"""Fused blocks with the signatures of existing diffusion code."""
