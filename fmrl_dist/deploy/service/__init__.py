"""The HTTP service: an export's recommender over FastAPI and uvicorn, which are imported here and nowhere else."""
