# A thin front to CMake and the scripts.
BUILD  ?= build
PREFIX ?= /usr/local
FORMAT_FLAGS = -i

all:
	@scripts/install-deps.sh --check build
	@cmake -S . -B $(BUILD) -DCMAKE_INSTALL_PREFIX=$(PREFIX) >/dev/null
	@cmake --build $(BUILD) --parallel $$(nproc)

demo:
	@scripts/demo.sh

check:
	@scripts/check.sh

# bench/compare.py -h tells the options; pass them as ARGS="-l depth0,read".
bench:
	@scripts/install-deps.sh bench
	@$(MAKE) --no-print-directory all
	@model=$$(scripts/fetch-model.sh) && python3 bench/compare.py --quarry $(BUILD)/quarry -m "$$model" $(ARGS)

# scripts/report.sh tells the options; pass them as ARGS="-s small".
report: all
	@scripts/report.sh -q $(BUILD)/quarry $(ARGS)

install: all
	@cmake --install $(BUILD) --prefix $(PREFIX)

fuzz:
	@scripts/install-deps.sh check
	@scripts/fuzz.sh

format:
	@find bench examples fuzz include src tests -name '*.[ch]' | xargs clang-format $(FORMAT_FLAGS)

clean:
	@rm -rf $(BUILD) build-*

.PHONY: all demo check bench report install fuzz format clean
