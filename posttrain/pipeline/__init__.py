"""The stage graph: plan, execution on Ray, artifacts and their lineage, report."""
