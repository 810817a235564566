{{/* Names and labels. 53 characters: the operator refuses longer names of clusters. */}}
{{- define "memusage.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{- define "memusage.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else if contains (include "memusage.name" .) .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "memusage.name" .) | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The cluster's name, also the value of the label dask_cluster. */}}
{{- define "memusage.cluster" -}}
{{- $generation := ternary .Values.cluster.operator.generation 0 (eq .Values.cluster.kind "operator") -}}
{{- include "memusage.generation" (dict "root" . "number" (int $generation)) -}}
{{- end -}}

{{/*
The name of a generation of it. Where it would be too long the end gives way to a hash of it, for names
of two releases may differ in their ends alone. Arguments: root, number.
*/}}
{{- define "memusage.generation" -}}
{{- $fullname := include "memusage.fullname" .root -}}
{{- $suffix := ternary (printf "-%d" .number) "" (gt .number 0) -}}
{{- if gt (len (print $fullname $suffix)) 53 -}}
{{- $suffix = printf "-%s%s" ($fullname | sha256sum | trunc 6) $suffix -}}
{{- $fullname = $fullname | trunc (sub 53 (len $suffix) | int) | trimSuffix "-" -}}
{{- end -}}
{{- print $fullname $suffix -}}
{{- end -}}

{{/* As JSON. */}}
{{- define "memusage.selectorLabels" -}}
{{- dict "app.kubernetes.io/name" (include "memusage.name" .) "app.kubernetes.io/instance" .Release.Name | toJson -}}
{{- end -}}

{{- define "memusage.labels" -}}
{{- include "memusage.labelsWith" (dict "root" .) -}}
{{- end -}}

{{/*
Labels, each key once: who sets one that is there already has the last word, but for those that select.
Arguments: root; more, a dict that may be nothing; pod, whether they are of a Deployment's pods. Those do
not name the chart's version: a new chart that changes nothing else of them leaves the cluster running.
*/}}
{{- define "memusage.labelsWith" -}}
{{- $labels := dict "app.kubernetes.io/managed-by" .root.Release.Service -}}
{{- if not .pod -}}
{{- $_ := set $labels "app.kubernetes.io/version" .root.Chart.AppVersion -}}
{{- $_ := set $labels "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_") -}}
{{- end -}}
{{- $selected := include "memusage.selectorLabels" .root | fromJson -}}
{{- mergeOverwrite $labels (default dict .root.Values.commonLabels) (default dict .more) $selected | toYaml -}}
{{- end -}}

{{/* What selects the pods of a cluster of our own, as JSON. Arguments: root, role. */}}
{{- define "memusage.podSelector" -}}
{{- if eq .root.Values.cluster.kind "operator" -}}
{{- dict "dask.org/cluster-name" (include "memusage.cluster" .root) "dask.org/component" .role | toJson -}}
{{- else -}}
{{- $labels := include "memusage.selectorLabels" .root | fromJson -}}
{{- set $labels "app.kubernetes.io/component" .role | toJson -}}
{{- end -}}
{{- end -}}

{{/* Pods with this label are clients of the cluster of our own. */}}
{{- define "memusage.clientLabel" -}}
{{ include "memusage.fullname" . }}-client
{{- end -}}

{{- define "memusage.serviceAccount" -}}
{{- if .Values.cluster.serviceAccount.create -}}
{{- default (include "memusage.fullname" .) .Values.cluster.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.cluster.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "memusage.image" -}}
{{- with .Values.cluster.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Whether the Prometheus operator's kinds are there: "true", or nothing. */}}
{{- define "memusage.hasMonitors" -}}
{{- if .Capabilities.APIVersions.Has "monitoring.coreos.com/v1" -}}true{{- end -}}
{{- end -}}

{{/* Name of a metric from a name with %NAMESPACE%_, which may be empty. */}}
{{- define "memusage.metricPrefix" -}}
{{- if .Values.metricNamespace -}}{{ .Values.metricNamespace }}_{{- end -}}
{{- end -}}

{{/* A number as it was written: values come as floats, and 1e+06 is no duration. */}}
{{- define "memusage.plain" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end -}}
