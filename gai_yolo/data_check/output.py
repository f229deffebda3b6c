"""The folder that a check leaves: report.json and pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gai_yolo.data.formats.check import Split
from gai_yolo.data.index import Index
from gai_yolo.data_check.charts import box_chart, class_chart, image_chart
from gai_yolo.data_check.inspection import Findings
from gai_yolo.data_check.report import Report, as_json, root_of
from gai_yolo.data_check.sheets import problem_sheet, sample_sheet
from gai_yolo.reporting.drawing import write_image
from gai_yolo.sections import DataConfig

DOCUMENT = "report.json"
PICTURES = ("problems.png", "samples_train.png", "samples_val.png", "classes.png", "boxes.png", "images.png")


def keep(folder: Path, config: DataConfig, findings: Findings, report: Report) -> Report:
    """Draw and write everything; what an earlier check has left and this one does not draw is removed.

    Returns:
        The report with the pictures' paths, as it was written.

    Raises:
        OSError: the disk refuses.
    """
    for name in (*PICTURES, DOCUMENT):
        (folder / name).unlink(missing_ok=True)
    wrong = problem_sheet(findings, root_of(config))
    pictures = {} if wrong is None else {"problems.png": wrong}
    indexes: dict[Split, Index] = {split: found.index for split, found in findings.splits.items() if found.index is not None}
    for split, index in indexes.items():
        pictures[f"samples_{split}.png"] = sample_sheet(split, index)
    if indexes:
        pictures |= {"classes.png": class_chart(report), "boxes.png": box_chart(indexes), "images.png": image_chart(indexes)}
    for name, image in pictures.items():
        write_image(folder / name, image)
    report = replace(report, pictures=[str(folder / name) for name in pictures])
    (folder / DOCUMENT).write_text(as_json(report), encoding="ascii")
    return report
