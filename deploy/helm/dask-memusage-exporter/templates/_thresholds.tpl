{{/*
Settings of the rules that no schema can hold: durations, and how they go together. The same as `checked`
in monitoring/rules.py; bounds are those of files/thresholds.yaml.
*/}}
{{- define "memusage.checkThresholds" -}}
{{- $given := .Values.rules.thresholds -}}
{{- range $name, $one := .Files.Get "files/thresholds.yaml" | fromYaml -}}
{{- if eq $one.unit "duration" -}}
{{- $value := index $given $name -}}
{{- $seconds := include "memusage.seconds" $value | float64 -}}
{{- if or (lt $seconds (include "memusage.seconds" $one.minimum | float64)) (gt $seconds (include "memusage.seconds" $one.maximum | float64)) -}}
{{- fail (printf "rules.thresholds.%s: %s is not a duration from %s to %s" $name $value $one.minimum $one.maximum) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $step := include "memusage.seconds" $given.step | float64 -}}
{{- range $name, $steps := dict "gap" 2 "regression-recent" 1 "regression-baseline" 1 -}}
{{- if lt (include "memusage.seconds" (index $given $name) | float64) (mulf $steps $step) -}}
{{- fail (printf "rules.thresholds.%s: %s is less than %d x step, which is %s; raise %s or lower step" $name (index $given $name) $steps $given.step $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A duration of Prometheus', such as 1d12h, in seconds. */}}
{{- define "memusage.seconds" -}}
{{- $units := dict "ms" 0.001 "s" 1 "m" 60 "h" 3600 "d" 86400 "w" 604800 -}}
{{- $sum := 0.0 -}}
{{- range regexFindAll "[0-9]+[a-z]+" . -1 -}}
{{- $sum = addf $sum (mulf (regexFind "[0-9]+" . | float64) (index $units (regexFind "[a-z]+" .))) -}}
{{- end -}}
{{- $sum -}}
{{- end -}}
