"""Our metrics as `evaluate.Metric` subclasses: the interface of the hub's, without a network. The harness itself calls `measures.py`."""

from __future__ import annotations

import datasets
import evaluate

from lst_scale.data.measures import MEASURES, Measure


class TextMetric(evaluate.Metric):  # type: ignore[misc]
    """A metric over predicted and expected texts. Subclasses give the measure."""

    measure: Measure
    name_in_results: str

    def __init__(self) -> None:
        # In memory: no cache file, no lock, nothing shared between processes.
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions and references are lists of texts",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {self.name_in_results: type(self).measure(predictions, references)}


def _metric(name: str, measure: Measure) -> type[TextMetric]:
    return type(name, (TextMetric,), {"measure": measure, "name_in_results": name, "__doc__": measure.description})


METRICS: dict[str, type[TextMetric]] = {name: _metric(name, measure) for name, measure in MEASURES.items()}
