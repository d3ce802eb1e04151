"""`python -m fedra_engine` is the command `fedra`."""

from fedra_engine.commands import main

if __name__ == "__main__":
    main()
