"""How a call is made so that its faults show: memory, layouts, devices, streams, evidence."""
