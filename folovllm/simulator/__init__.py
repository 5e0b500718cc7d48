"""The real engine on a clock of its own: what every switch does on a GPU that the reader does not have.

Scheduler, cache and outputs are the engine's own. The forward pass is replaced by what it would cost, and time by what
it would take. Counts are exact; seconds come from a formula (`folovllm.simulator.cost`) and are within 10 to 25 % of
real ones as long as the machine is not close to saturation, where a step that is 10 % too slow doubles a queue.
"""
