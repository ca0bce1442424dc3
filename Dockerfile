# Serves the page and the HTTP interface on port 8000:
#   docker build -t longvideo .
#   docker run --gpus all -p 8000:8000 -e LONGVIDEO_TOKEN=SECRET -v "$PWD/served:/data/served" longvideo
# Any other command works in place of `serve`: docker run --gpus all longvideo doctor
#
# torch's wheels contain the CUDA libraries, so the smallest CUDA image is enough. Triton compiles with gcc at run time.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/longvideo/bin:$PATH PYTHONUNBUFFERED=1
COPY pyproject.toml constraints.txt README.md LICENSE /source/
COPY longvideo /source/longvideo
COPY kernels /source/kernels
COPY train /source/train
COPY distill /source/distill
COPY infer /source/infer
COPY configs /source/configs
RUN python3 -m venv /opt/longvideo \
    && pip install --no-cache-dir -c /source/constraints.txt "/source[serve]" \
    && rm -rf /source

# the server needs no rights beyond its folder
RUN useradd --uid 10001 --create-home longvideo && install -d -o longvideo /data /data/served
USER longvideo
WORKDIR /data
VOLUME /data/served
EXPOSE 8000

# loading a model of 5 billion parameters takes minutes
HEALTHCHECK --start-period=10m --interval=30s --timeout=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]

# clients outside the container need a token: without LONGVIDEO_TOKEN the server refuses to start
ENTRYPOINT ["longvideo"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--folder", "/data/served"]
