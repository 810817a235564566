{{/* Dask's configuration, a YAML file of it. Preloads that are given, a list or one, stay. */}}
{{- define "memusage.daskConfig" -}}
{{- $config := default dict .Values.config.dask | deepCopy -}}
{{- $preload := dig "distributed" "scheduler" "preload" list $config | default list -}}
{{- if kindIs "string" $preload -}}
{{- $preload = list $preload -}}
{{- end -}}
{{- $distributed := dict
      "scheduler" (dict "preload" (append $preload "dask_memusage_exporter" | uniq))
      "dashboard" (dict "prometheus" (dict "namespace" .Values.metricNamespace)) -}}
{{- with .Values.config.jemalloc -}}
{{- if .enabled -}}
{{- $environ := dict "LD_PRELOAD" .library "PYTHONMALLOC" "malloc" "ARROW_DEFAULT_MEMORY_POOL" "system" -}}
{{- $_ := set $distributed "nanny" (dict "pre-spawn-environ" $environ) -}}
{{- end -}}
{{- end -}}
{{- $ours := dict "distributed" $distributed -}}
{{- with .Values.config.memusage -}}
{{- $_ := set $ours "memusage" . -}}
{{- end -}}
{{- if ne .Values.cluster.kind "none" -}}
{{- $config = merge $config (dict "temporary-directory" "/var/lib/dask-scratch") -}}
{{- end -}}
{{- mergeOverwrite $config $ours | toYaml -}}
{{- end -}}

{{/* The same as environment, for where no file can be mounted: a JSON list of names and values. */}}
{{- define "memusage.daskEnvironment" -}}
{{- $config := include "memusage.daskConfig" . | fromYaml -}}
{{- $lines := list -}}
{{- range (include "memusage.flat" (dict "above" "DASK" "value" (omit $config "distributed") "sep" "_") | fromJsonArray) -}}
{{- $lines = append $lines . -}}
{{- end -}}
{{- range (include "memusage.flat" (dict "above" "DASK" "value" (dict "distributed" (omit $config.distributed "nanny")) "sep" "_") | fromJsonArray) -}}
{{- $lines = append $lines . -}}
{{- end -}}
{{- concat $lines .Values.config.environment | toJson -}}
{{- end -}}

{{/* Arguments: above, value, sep. Dask takes __ for a level, and - and _ for the same. */}}
{{- define "memusage.flat" -}}
{{- $lines := list -}}
{{- range $name, $value := .value -}}
{{- $whole := printf "%s%s%s" $.above $.sep ($name | upper | replace "-" "_") -}}
{{- if kindIs "map" $value -}}
{{- $lines = concat $lines (include "memusage.flat" (dict "above" $whole "value" $value "sep" "__") | fromJsonArray) -}}
{{- else if kindIs "slice" $value -}}
{{- $lines = append $lines (dict "name" $whole "value" (toJson $value)) -}}
{{- else if not (kindIs "invalid" $value) -}}
{{- $lines = append $lines (dict "name" $whole "value" (include "memusage.plain" $value)) -}}
{{- end -}}
{{- end -}}
{{- toJson $lines -}}
{{- end -}}

{{/* Where workers note what they run; may be nothing. */}}
{{- define "memusage.flight" -}}
{{- dig "flight-directory" "" (default dict .Values.config.memusage) -}}
{{- end -}}

{{- define "memusage.configMap" -}}
{{ include "memusage.fullname" . }}-dask
{{- end -}}

{{/* Where Dask finds our file, last among its places: DASK_CONFIG. */}}
{{- define "memusage.configPath" -}}/etc/dask-memusage{{- end -}}

{{/* Whether OpenTelemetry is asked for, by schedulers or workers: "true", or nothing. */}}
{{- define "memusage.telemetry" -}}
{{- $given := default list .Values.config.environment -}}
{{- if ne .Values.cluster.kind "none" -}}
{{- $given = concat $given (default list .Values.cluster.scheduler.environment) (default list .Values.cluster.worker.environment) -}}
{{- end -}}
{{- $names := list -}}
{{- range $given -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- if regexMatch "(^|,)OTEL_" (join "," $names) -}}true{{- end -}}
{{- end -}}

{{/* What pip installs: by default the package that rules and dashboards here are of. */}}
{{- define "memusage.requirement" -}}
{{- $extra := ternary "[otlp]" "" (eq (include "memusage.telemetry" .) "true") -}}
{{- default (printf "dask-memusage-exporter%s==%s" $extra .Chart.AppVersion) .Values.package.requirement -}}
{{- end -}}

{{/* The init container that installs the package. Needs the volumes `dask-memusage` and `tmp`. */}}
{{- define "memusage.installer" -}}
name: install-dask-memusage
image: {{ include "memusage.image" . }}
imagePullPolicy: {{ .Values.cluster.image.pullPolicy }}
{{ include "memusage.installerBody" . }}
{{- end -}}

{{/*
--prefix and not --target: pip then leaves out what the image has, so that no second Dask comes to stand
before the image's own. The link spares PYTHONPATH the version of Python.
*/}}
{{- define "memusage.installerBody" -}}
command:
  - sh
  - -ec
  - |
    python -m pip install --no-input --no-cache-dir --disable-pip-version-check \
      --prefix "$PACKAGES" "$@"
    cd "$PACKAGES"
    ln -sfn lib/python*/site-packages site
  - install
args:
  {{- range .Values.package.pipArgs }}
  - {{ . | quote }}
  {{- end }}
  - {{ include "memusage.requirement" . | quote }}
env:
  - {name: PACKAGES, value: {{ .Values.package.path | quote }}}
  - {name: HOME, value: /tmp}
resources:
  {{- toYaml .Values.package.resources | nindent 2 }}
securityContext:
  {{- toYaml .Values.cluster.securityContext | nindent 2 }}
volumeMounts:
  - {name: dask-memusage, mountPath: {{ .Values.package.path | quote }}}
  - {name: tmp, mountPath: /tmp}
{{- end -}}
