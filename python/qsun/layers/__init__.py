"""The layers of a decoder, on the operators of `qsun_kernels`.  Inference only: no layer has a gradient."""
