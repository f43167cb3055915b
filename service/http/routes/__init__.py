"""The routes, by resource: images, models, jobs, OpenAI's API, probes, and the pages for people."""
