"""`python -m fedlora_kernels` is the command `fedlora`."""

from fedlora_kernels.cli import main

if __name__ == "__main__":
    main()
