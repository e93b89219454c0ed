"""Processes that run cases: forked from one server that has imported everything, or started one by one."""
