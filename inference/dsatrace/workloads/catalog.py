"""The table of data sets. A new one is a file of its own and its name here.

DATA_SETS["longbenchv2"].hub_file()
DATA_SETS["ruler"].hub_file(revision="main", file="data_debug.tgz")   # its bytes are not checked
"""

from __future__ import annotations

from dsatrace.workloads.burstgpt import BURSTGPT
from dsatrace.workloads.data_set import DataSet
from dsatrace.workloads.longbench_v2 import LONGBENCH_V2
from dsatrace.workloads.ruler.workload import RULER
from dsatrace.workloads.sharegpt import SHAREGPT

DATA_SETS: dict[str, DataSet] = {
    data_set.name: data_set for data_set in (RULER, LONGBENCH_V2, SHAREGPT, BURSTGPT)
}
