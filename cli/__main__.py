"""``python -m actstore_cli``, which torchrun needs."""

from . import main

if __name__ == "__main__":
    main()
