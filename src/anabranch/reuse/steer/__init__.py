# SPDX-License-Identifier: Apache-2.0
"""Change what a trained mixture says without training: by its routing alone, and undone at any time."""
