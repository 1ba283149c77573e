"""Drop-in modules and peft methods on top of genft_kernels."""
