# SPDX-License-Identifier: Apache-2.0
"""`python -m anabranch …`, the form that torchrun starts."""

from anabranch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
