"""The command line: python -m modeldemo serve ..."""

from modeldemo.serve import main

if __name__ == "__main__":
    main()
