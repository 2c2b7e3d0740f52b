"""How work and arrays are spread over devices: layout as data, and the only hand-written collectives."""
