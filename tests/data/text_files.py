"""Write texts to files and load them."""

from pathlib import Path

from datasets import Dataset

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.sources import load_source

ROWS = [
    {"text": f'It said "{letter}", then\tnothing', "label": label, "domain": domain}
    for domain in ("books", "films")
    for label in ("bad", "good")
    for letter in "abcde"
]


def write(file: Path, rows: list[dict] = ROWS, end: str = "\n") -> Path:
    """`rows` as whatever kind of file `file` says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_list(rows)
    if file.suffix == ".csv":
        file.write_text(data.to_pandas().to_csv(index=False), newline=end)
    elif file.suffix == ".tsv":
        lines = [list(rows[0]), *(row.values() for row in rows)]
        text = "".join("\t".join(str(value).replace("\t", " ") for value in line) + "\n" for line in lines)
        file.write_text(text, newline=end)
    elif file.suffix == ".jsonl":
        file.write_text(data.to_pandas().to_json(orient="records", lines=True), newline=end)
    else:
        data.to_parquet(file)
    return file


def load(root: Path, source: str = "text_classification", seed: int = 0, **settings: object) -> DomainData:
    return load_source(DataConfig(source, str(root), **settings), seed)


def texts(data: DomainData) -> list[str]:
    return list(data.content["text"])
