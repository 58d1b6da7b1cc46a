"""Triton kernels of the codec, installed as `parablock_rt.kernels`.

Needs torch and triton and nothing of the runtime. Empty until the GPU data path is built: on every device the codec
runs on the CPU for now.
"""
