# Serves a model over HTTP on port 8000. For an accelerator: docker build --build-arg EXTRA=cuda (or tpu) .
#   docker run -p 8000:8000 IMAGE                                                      the embedded model
#   docker run -p 8000:8000 -v /path/to/model:/model:ro IMAGE --model /model           a Hugging Face directory
FROM python:3.12-slim
ARG EXTRA=cpu
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY diffulex_jax diffulex_jax
COPY pallas_kernels pallas_kernels
RUN pip install --no-cache-dir ".[serve,${EXTRA}]" && useradd --create-home serve
WORKDIR /home/serve
USER serve
EXPOSE 8000
HEALTHCHECK --start-period=15m CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"
ENTRYPOINT ["diffulex-jax", "serve", "--host", "0.0.0.0"]
CMD ["--model", "embedded"]
