"""What we are compared with: other kernels (``kernels``), engines and training loops, the diffusion model ``iddpm``."""
