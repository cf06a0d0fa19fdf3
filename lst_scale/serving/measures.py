"""What /metrics tells, in Prometheus' form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from lst_scale.serving.engine import Engine
from lst_scale.serving.networks import Networks


class Measures:
    """Requests and times, and what the engine has counted."""

    def __init__(self, engine: Engine, networks: Networks) -> None:
        self._engine, self._networks = engine, networks
        self.registry = CollectorRegistry()
        self.requests = Counter("lst_requests", "Requests by path and status", ["path", "status"], registry=self.registry)
        buckets = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        self.first = Histogram("lst_first_token_seconds", "From arrival to the first token", buckets=buckets, registry=self.registry)

    def text(self) -> bytes:
        counts, passes = self._engine.counts, self._engine.passes
        lines = {
            "lst_rows_running": self._engine.num_running,
            "lst_requests_waiting": self._engine.num_waiting,
            "lst_side_networks": len(self._networks.names) - 1,
            "lst_tokens_total": counts.tokens,
            "lst_backbone_rounds_total": counts.rounds,
            "lst_backbone_rows_total": counts.rows_in_rounds,
            "lst_backbone_tokens_total": passes.tokens_run,
            "lst_prompts_run_total": passes.prompts_run,
            "lst_prompts_reused_total": self._engine.reader.reused,
        }
        kinds = {name: "counter" if name.endswith("_total") else "gauge" for name in lines}
        own = "".join(f"# TYPE {name} {kinds[name]}\n{name} {value}\n" for name, value in lines.items())
        return bytes(generate_latest(self.registry)) + own.encode()
