from evatok.benchmarks.fanout import SimulationConfig, simulate

CALM = SimulationConfig(clips=10_000, workers=32, straggler_rate=0, failure_rate=0, lost_nodes=0)


def test_a_calm_simulated_cluster_is_busy_to_the_end():
    result = simulate(CALM, 8, [10.0])
    assert result["efficiency"] > 0.97
    assert (result["retries"], result["copies"], result["given_up"]) == (0, 0, 0)
    assert result["tail_seconds"] < 10


def test_stragglers_failures_and_lost_nodes_cost_what_they_burn_and_lose_nothing():
    rough = SimulationConfig(clips=10_000, workers=32)
    result = simulate(rough, 8, [9.0, 10.0, 11.0])
    assert result["given_up"] == 0
    assert result["retries"] > 0
    assert result["efficiency"] > 0.8
    assert result == simulate(rough, 8, [9.0, 10.0, 11.0])


def test_a_straggler_at_the_end_is_overtaken_by_its_copy():
    late = CALM.model_copy(update={"straggler_rate": 0.05, "straggler_factor": 1000.0, "clips": 256})
    result = simulate(late, 8, [10.0])
    assert result["copies"] > 0
    assert result["seconds"] < 200
