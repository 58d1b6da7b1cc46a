"""`python -m parablock_rt` is the command line."""

from parablock_rt.cli import main

if __name__ == "__main__":
    main()
