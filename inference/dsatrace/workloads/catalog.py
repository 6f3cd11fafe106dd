"""The table of data sets. A new one is a file in `served/`, and a line here.

DATA_SETS["longbenchv2"].hub_file()
DATA_SETS["ruler"].hub_file(revision="main", file="data_debug.tgz")   # taken as it comes
"""

from __future__ import annotations

from dsatrace.errors import UserError
from dsatrace.workloads.burstgpt import BURSTGPT
from dsatrace.workloads.data_set import DataSet
from dsatrace.workloads.longbench_v2 import LONGBENCH_V2
from dsatrace.workloads.ruler.workload import RULER
from dsatrace.workloads.sharegpt import SHAREGPT

DATA_SETS: dict[str, DataSet] = {
    data_set.name: data_set for data_set in (RULER, LONGBENCH_V2, SHAREGPT, BURSTGPT)
}


def data_set_named(name: str) -> DataSet:
    """The data set; raises `UserError` where there is none of that name."""
    if name not in DATA_SETS:
        raise UserError(f"unknown data set {name!r}; use one of {', '.join(DATA_SETS)}")
    return DATA_SETS[name]
