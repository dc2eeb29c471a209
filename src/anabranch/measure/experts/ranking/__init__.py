# SPDX-License-Identifier: Apache-2.0
"""Rankings of experts, one file each, under one interface.

    NEEDS                                       what has to be collected: "routing", "outputs", "residual",
                                                or the name of a sum that only the ranking's own `collect` makes
    rank(stats, target, others) -> (L, N)       float64, higher: belongs more to the label `target`

`others` are the labels that the target is set against; a ranking of one label alone does not read them. Rankings that
need the model, such as a tuned router or gradients, have a `collect` of their own that makes the statistics.
"""
