"""The rows of the table, in its order."""

from benchmarks.performance._row import Row
from benchmarks.performance.rows import basis, disk, growth, inputs, layer, memory, process, script, step, switch

ROWS: dict[str, Row] = {
    row.name: row
    for module in (layer, step, inputs, script, basis, memory, disk, switch, process, growth)
    for row in module.ROWS
}
