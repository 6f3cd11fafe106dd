"""The four data sets: where each lies on the hub, what its bytes are, and on which terms.

Revisions and sha256 are pinned, so that two runs that say `hub` read the same bytes. Knows
no network and no format.

    DATA_SETS["longbenchv2"].hub_file()
    DATA_SETS["ruler"].hub_file(revision="main", file="data_debug.tgz")   # taken as it comes
"""

from __future__ import annotations

import dataclasses

from dsatrace.errors import UserError
from dsatrace.workloads.hub import HubFile


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set. `sample` is its name among the embedded ones, None where a generator stands in."""

    name: str
    hub: HubFile
    licence: str
    script: str
    file_flag: str
    sample: str | None

    def hub_file(
        self, repo: str | None = None, file: str | None = None, revision: str | None = None
    ) -> HubFile:
        """The file on the hub; its sha256 is known if repository and file are the pinned ones.

        A revision that is named is taken as it is: so a pinned sha256 can be passed over.
        """
        pinned = self.hub
        same_repo = repo in (None, pinned.repo)
        same = same_repo and file in (None, pinned.file) and revision is None
        return dataclasses.replace(
            pinned,
            repo=repo or pinned.repo,
            file=file or pinned.file,
            revision=revision or (pinned.revision if same_repo else "main"),
            sha256=pinned.sha256 if same else None,
        )

    def remedy(self) -> str:
        """What else a user can do for the data, as the end of an error line."""
        return f"download it with {self.script} on a machine that can, or name a file with {self.file_flag}"


DATA_SETS = {
    data_set.name: data_set
    for data_set in (
        DataSet(
            name="ruler",
            hub=HubFile(
                repo="allenai/ruler_data",
                file="data_100_samples.tgz",
                revision="b2d1d948dc4f6ca37c0135123f3b3afbed741130",
                sha256="a8da67ff3a7e6866a8012b81c79084f763111be54bd3a44e86eb18a377eb53c3",
            ),
            licence="the generator is Apache-2.0; qa rows hold SQuAD 2.0 and HotpotQA text (CC-BY-SA-4.0), "
            "essay rows Paul Graham's essays (no open licence)",
            script="scripts/datasets/download_ruler.sh",
            file_flag="--ruler-path",
            sample=None,
        ),
        DataSet(
            name="longbenchv2",
            hub=HubFile(
                repo="zai-org/LongBench-v2",
                file="data.json",
                revision="2b48e494f2c7a2f0af81aae178e05c7e1dde0fe9",
                sha256="15d61c22d92c96900b3c4948b6aeea218d3214b676a65df48e7b8555604c7fe2",
            ),
            licence="Apache-2.0",
            script="scripts/datasets/download_longbench_v2.sh",
            file_flag="--longbenchv2-json",
            sample="longbench_v2",
        ),
        DataSet(
            name="sharegpt",
            hub=HubFile(
                repo="anon8231489123/ShareGPT_Vicuna_unfiltered",
                file="ShareGPT_V3_unfiltered_cleaned_split.json",
                revision="bcd32a724d8460ebe14e1d05b0195e30e9a46cb1",
                sha256="35f0e213ce091ed9b9af2a1f0755e9d39f9ccec34ab281cd4ca60d70f6479ba4",
            ),
            licence="its card says Apache-2.0; the text is what people shared of their chats",
            script="scripts/datasets/download_sharegpt.sh",
            file_flag="--sharegpt-json",
            sample="sharegpt",
        ),
        DataSet(
            name="burstgpt",
            # No revision of the mirror is known to be kept; the bytes are pinned as the v2.0 release's.
            hub=HubFile(
                repo="lzzmm/BurstGPT",
                file="data/BurstGPT_1.csv",
                sha256="4bb3783693d0a435686fbfc885615d2349bd067239079fa4b749f2e679e12122",
            ),
            licence="CC-BY-4.0 (HPMLL/BurstGPT, arXiv:2401.17644)",
            script="scripts/datasets/download_burstgpt.sh",
            file_flag="--burstgpt-csv",
            sample="burstgpt",
        ),
    )
}


def data_set_named(name: str) -> DataSet:
    if name not in DATA_SETS:
        raise UserError(f"unknown data set {name!r}; use one of {', '.join(DATA_SETS)}")
    return DATA_SETS[name]
